"""Attention modes: scheme x local kernel."""
