#include "copy_config.hpp"

#include <algorithm>

#include "../utils/error.hpp"

namespace specgen {
namespace {

// Below this a bulk copy's fixed cost outweighs what it saves in instructions.
constexpr uint32_t kSmallestBulkSegment = 512;
// A block with less work than this finishes later than its start-up pays for.
constexpr uint64_t kLeastBytesPerBlock = 16 * 1024;

}  // namespace

std::string CopyConfig::to_string() const {
    return concat("CopyConfig(method=", method, ", sms=", sms, ", warps=", warps, ", stages=", stages, ", stage_bytes=", stage_bytes, ")");
}

CopyConfig select_copy_config(uint32_t slot_bytes, uint64_t total_bytes, Direction direction, uint32_t sm_budget) {
    const uint64_t useful = std::max<uint64_t>(1, (total_bytes + kLeastBytesPerBlock - 1) / kLeastBytesPerBlock);
    const uint32_t sms = uint32_t(std::min<uint64_t>(sm_budget, useful));
    if (slot_bytes < kSmallestBulkSegment) return {"vector", sms, 32, 0, 0};
    (void)direction;
    constexpr uint32_t kWarps = 4;
    // Three stages are the least that keep a load in flight while two drain; more bytes in flight hide a pull's round trip.
    const uint32_t stage_bytes = std::max(slot_bytes, std::min(8192u, 32 * slot_bytes) / slot_bytes * slot_bytes);
    const uint32_t stages = std::min(8u, kSharedBytesPerBlock / ring_bytes(kWarps, 1, stage_bytes));
    if (stages >= 3) return {"bulk", sms, kWarps, stages, stage_bytes};
    return {"bulk", sms, 2, std::min(8u, kSharedBytesPerBlock / ring_bytes(2, 1, stage_bytes)), stage_bytes};
}

void check_copy_config(const CopyConfig& config, uint32_t slot_bytes) {
    const auto require = [&](bool ok, const char* field, uint64_t value, const char* remedy) {
        if (!ok) throw UsageError(concat(field, "=", value, ": ", remedy));
    };
    if (config.method != "bulk" && config.method != "vector") throw UsageError(concat("method=", config.method, ": use vector or bulk"));
    require(config.sms > 0, "sms", config.sms, "use at least one");
    if (config.method == "vector") return require(config.warps > 0 && config.warps <= 32, "warps", config.warps, "use 1 to 32");
    require(config.warps > 0 && config.warps <= 8, "warps", config.warps, "use 1 to 8");
    require(config.stages >= 3 && config.stages <= 16, "stages", config.stages, "use 3 to 16");
    require(config.stage_bytes >= slot_bytes, "stage_bytes", config.stage_bytes, "a stage must hold the largest segment");
    require(config.stage_bytes % 16 == 0, "stage_bytes", config.stage_bytes, "use a multiple of 16");
    require(config.shared_bytes() <= kSharedBytesPerBlock, "shared bytes of warps, stages and stage_bytes", config.shared_bytes(), "exceeds a block's shared memory");
}

}  // namespace specgen
