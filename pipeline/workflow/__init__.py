"""Stages of a run: what they are called, how they tell how far they are, and how Ray or KubeRay runs them."""
