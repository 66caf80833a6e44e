"""What every command and package shares: errors, files, settings, the command line, figures."""
