"""The methods of compression, each an object that declares itself."""
