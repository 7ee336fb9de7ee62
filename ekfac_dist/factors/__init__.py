"""The factor store: its format, reading, writing and checking, and solving with what is in it."""
