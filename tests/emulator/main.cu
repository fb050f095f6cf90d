#include "cases.h"

int main(int count, char** words) {
  if (count < 2) {
    for (const auto& [name, run] : cases::all()) std::printf("%s\n", name.c_str());
    return 0;
  }
  const auto found = cases::all().find(words[1]);
  if (found == cases::all().end()) {
    std::printf("no such case\n");
    return 2;
  }
  try {
    found->second();
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  std::printf("ok\n");
  return 0;
}
