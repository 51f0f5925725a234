"""Doors: the ways in which a user writes a loop. Each produces the nouns of `iterreduce.loop` and nothing
else.
"""
