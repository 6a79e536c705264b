"""Policies that decide, for each sample, what is computed: small, without side effects."""
