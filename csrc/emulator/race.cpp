#include "emulator/block.h"
