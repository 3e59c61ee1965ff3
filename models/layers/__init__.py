"""Parts that every backbone uses, one idea a file."""
