"""The exercises of the module, and the load generator they share."""
