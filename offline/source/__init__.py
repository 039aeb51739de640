"""The dense model: its family, its files, its layers one at a time, and the text it is measured on."""
