"""Tasks, metrics and reports. A model is seen only through the LanguageModel protocol."""
