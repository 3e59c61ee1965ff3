"""What a call of main.py sets up, compares between processes and begins with."""
