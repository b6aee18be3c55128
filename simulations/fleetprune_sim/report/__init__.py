"""Finished simulations side by side: a page for people, tables for scripts."""
