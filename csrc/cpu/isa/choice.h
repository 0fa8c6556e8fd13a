#pragma once

#include <string>

namespace fastphi {

std::string isa_in_use();
std::string isas_compiled();  // separated by spaces, best first

}  // namespace fastphi
