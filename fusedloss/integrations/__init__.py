"""fusedloss inside other projects, one module for each; a module imports the project that it is named after."""
