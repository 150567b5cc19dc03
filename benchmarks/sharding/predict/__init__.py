"""A step's time and memory: by formula, and from the program that the target's compiler makes."""
