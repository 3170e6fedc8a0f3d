"""The quickstart: from raw text to an exported chat model and a report, in stages that resume."""
