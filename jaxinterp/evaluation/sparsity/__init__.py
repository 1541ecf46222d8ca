"""How sparse a model is, and what leaving neurons out does: calibration, measures, budgets of layers."""
