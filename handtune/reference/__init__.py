"""What the command line says about itself: its grammar, the fields of a configuration, other tools' names of them."""
