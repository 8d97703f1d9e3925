"""Files, tables, the hub, processes, progress bars and this machine. Nothing here knows what a
model is.
"""
