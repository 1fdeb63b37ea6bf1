"""Problems that a program makes and judges, so that a model can learn from its own answers; no model runs here."""
