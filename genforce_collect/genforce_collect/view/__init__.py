"""The live view: messages, live or of a bag, as a scene in Rerun's web viewer.

Rerun (requirements/view.txt) is imported here and nowhere else.
"""
