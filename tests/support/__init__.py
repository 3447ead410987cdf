"""What tests share, and no test: daemons and clients, what goes on around them, and what may not be left over."""
