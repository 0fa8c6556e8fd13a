"""`make demo`: photographs cut into patches (`patches`), the paper's loop on them (`demo`), and drawn
(`report`).
"""
