"""``make bench``: fellrec against a hand-written loop and other frameworks, on the same rows in the same order."""
