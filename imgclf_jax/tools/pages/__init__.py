"""Parts of pages that the tools share: HTML, line charts, figures. No command."""
