"""How fast models run on this machine, beside others and beside what the machine could do."""
