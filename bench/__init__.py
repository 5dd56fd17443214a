"""Measurements. Every figure that fastsd's pages quote comes from a file that these programs wrote into bench/results/."""
