"""How much memory a training takes, before any of it is allocated: the real code, run on shapes."""
