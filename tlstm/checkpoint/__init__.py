"""Files on disk: whole sets of them, replaced so that a killed save never shows, and read without trusting them.

No model knowledge. `files.py` is the way in.
"""
