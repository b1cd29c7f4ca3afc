"""Change of basis: which values share one vector space, and which operators let a transform of it pass.

`transforms` says which class of transform commutes with which role of an operator, `regions` grows the set of values
that must change basis together. Neither knows a pass; neither edits a graph.
"""
