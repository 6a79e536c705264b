"""Rows as tables, pages and pictures. Measures nothing."""
