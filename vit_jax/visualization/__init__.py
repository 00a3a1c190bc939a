"""Analysis of models (arrays to arrays), figures (arrays to matplotlib), and the HTML report."""
