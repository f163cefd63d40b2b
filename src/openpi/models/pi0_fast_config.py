"""`Pi0FASTConfig`: everything that decides a pi0-FAST model. Source: the model specification, section 1.2. No JAX here."""
