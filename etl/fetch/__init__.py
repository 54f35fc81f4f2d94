"""Inputs from elsewhere: downloads of named datasets, and files of object stores."""
