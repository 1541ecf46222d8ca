"""Attribution graphs: which features, tokens and errors a prediction is made of, by exact linear effects."""
