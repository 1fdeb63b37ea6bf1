"""The network and its parts: shapes, layers, caches, other families."""
