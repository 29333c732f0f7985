"""Scaling laws: loss as a function of parameters, tokens and unique tokens; fitted to runs, and asked questions.

`forms` holds the formulas and the published constants, `runs` reads results, `fit` fits them with intervals, `answers`
turns a fit into sizes, epochs and compute. numpy only.
"""
