"""How a program is shut in: one class a method, and the two scripts that run inside.

`enter` and `run` are scripts of the standard library alone. They are started by path or text in an
interpreter without site packages, and import nothing of optiq.
"""
