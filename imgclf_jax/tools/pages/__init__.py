"""Building blocks of the tools' pages: HTML, line charts, figures. No command."""
