"""The tasks meProp is measured on; each file reads from its data through its model to its metric."""
