"""Optional parts, each opened by a script only when asked for."""
