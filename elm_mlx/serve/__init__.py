"""An HTTP server of models, in the shapes of OpenAI's API: `elm-mlx serve`."""
