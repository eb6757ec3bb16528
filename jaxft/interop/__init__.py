"""Folders that other libraries read and write."""
