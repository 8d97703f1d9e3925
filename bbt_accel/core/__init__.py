"""What every stage shares: bundles, batches, prompts, objectives, and the declarations of
engines.
"""
