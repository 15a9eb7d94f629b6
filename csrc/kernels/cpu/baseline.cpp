#define FUSEDLOSS_TABLE kBaseline
#include "table.inl"
