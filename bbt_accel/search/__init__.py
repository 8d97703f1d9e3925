"""The search for a soft prompt, the readouts fitted beside it, and the run that holds the
result.
"""
