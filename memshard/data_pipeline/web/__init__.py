"""From web archives to documents: records, main text, language, quality."""
