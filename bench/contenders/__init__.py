"""Contenders of a drain: pgtask, the bare minimum that Postgres allows, and other engines."""
