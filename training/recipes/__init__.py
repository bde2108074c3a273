"""Runs described by a YAML file: reading and checking it, its stages, the folder it leaves."""
