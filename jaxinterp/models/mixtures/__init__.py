"""MLP sublayers made of experts: a router, and many small MLPs of which each token uses a few.

Their arrays, below the leaf's own name: `router` (logits), `experts/index` (the experts that a token uses) and
`experts/weight` (how much each counts). The leaf is the whole mixture.
"""
