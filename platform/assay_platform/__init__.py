"""What every Assay application stands on: compute, storage, the MoE backbone, training, tuning, registry."""
